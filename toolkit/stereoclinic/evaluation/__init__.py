"""Measuring what a treatment did.

readers     tell the groups apart in a picture
metrics     how far the groups' shares are from parity, and what else changed
intervals   how sure that is, and what chance alone would show
bench       draws the same seeds by every arm, and reads them
baselines   other methods, as arms
results     the figures as plain data, and how two results differ
report      what is left on disk: the page, its tables and pictures
"""
