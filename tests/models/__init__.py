"""Models of the two algorithms that everything depends on, and a command that checks them."""
