"""Stereotype neuron suppression: a mask is chosen (`select`, `plan`), kept (`mask`) and applied (`damp`)."""
