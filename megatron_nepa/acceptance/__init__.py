"""What only a GPU can show, in 25 minutes on one: the parts, the processes that run them and the report."""
