"""Drive the model and optimizer of a run; one module for each training framework."""
