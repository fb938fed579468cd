"""Evaluation of edits on whole sets, behind `ddengine eval`: rows x samples, resumable, judged, tabled, reported."""

__version__ = "0.0.0"
