"""The composed configuration: how it is made, checked and shown."""
