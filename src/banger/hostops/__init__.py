"""What needs root, behind one typed door: a closed set of operations, and who performs them."""
