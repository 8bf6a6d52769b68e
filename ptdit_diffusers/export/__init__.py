"""From a model folder to a folder for the Hub that carries its own code (`ptdit export`)."""
