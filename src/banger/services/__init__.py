"""What banger does, independent of how it is asked and of which drivers do it."""
