"""From a model folder to a folder for the Hugging Face Hub with its own code (`ptdit export`)."""
