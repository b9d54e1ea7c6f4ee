"""What a memory is: the rules, a user's bank and record, everybody's memories searchable at once. No torch, no I/O."""
