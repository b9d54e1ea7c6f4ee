"""What is searched: the banks of residents and the collective index, on the CPU or on a GPU copy."""
