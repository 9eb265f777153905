"""Before hours of computing: does dmin do right by this model, and what will it cost?"""

from dmin.collect.prediction import Cost
from dmin.doctor.diagnosis import Check, Covered, Diagnosis
from dmin.doctor.examine import diagnose

__all__ = ["Check", "Cost", "Covered", "Diagnosis", "diagnose"]
