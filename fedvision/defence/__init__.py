"""Whose updates are left out of a round's sum, decided from norms and inner products alone."""
