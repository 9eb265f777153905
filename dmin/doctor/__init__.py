"""Before hours of computing: does dmin do right by this model, and what will it cost?"""

from dmin.doctor.diagnosis import Check, Cost, Covered, Diagnosis
from dmin.doctor.examine import diagnose

__all__ = ["Check", "Cost", "Covered", "Diagnosis", "diagnose"]
