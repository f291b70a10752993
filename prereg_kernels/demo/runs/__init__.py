"""The directories of runs, and the processes that train in them."""
