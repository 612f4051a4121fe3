"""One step: rules on matrices wherever they live."""
