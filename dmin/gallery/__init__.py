"""Rankings as pictures and pages."""
