"""The call that is being answered: its deadline and identity, what wraps it, how it is logged and traced."""
