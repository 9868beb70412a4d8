"""How each kind of golden file is rebuilt and compared: one module a family of methods."""
