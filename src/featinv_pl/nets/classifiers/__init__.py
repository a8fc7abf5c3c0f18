"""Classifiers of each library that they come from, behind one interface."""
