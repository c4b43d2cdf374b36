"""Models against each other: what is asked for, the runs it takes, and the tables made of them."""
