"""The words of a sentence: the folder says the kind, the file says the name, the function has the same name."""
