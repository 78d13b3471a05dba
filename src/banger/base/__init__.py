"""What every layer may import: errors, model, settings, paths, logging, processes."""
