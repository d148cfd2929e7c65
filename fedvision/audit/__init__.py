"""Checks afterwards what a run claims, by somebody who was not there."""
