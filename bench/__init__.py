"""How fast the engines are: what is timed, against whom, and the results."""
