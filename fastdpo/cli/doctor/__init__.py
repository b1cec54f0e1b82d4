"""`fastdpo doctor`: this machine, the path of the op on it, and the op against float64."""
