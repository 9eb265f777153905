"""The local web page: retrieve for a picture or a prompt, with the model kept loaded."""
