"""The local page: ask with a picture, a part of it or a prompt, the model kept loaded."""
