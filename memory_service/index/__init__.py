"""What is searched: residents' banks and everybody's memories, on the CPU or on a copy on a GPU."""
