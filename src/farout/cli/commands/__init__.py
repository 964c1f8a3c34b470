"""The functions behind the commands, one module each: parameters are flags, docstrings are the help."""
