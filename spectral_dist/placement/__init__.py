"""Where parameters live, as the core asks for it."""
