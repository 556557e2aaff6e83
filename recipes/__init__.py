"""What people run: YAML recipes and the code that belongs to one of them alone."""
