"""Runs with several processes: collectives, functions for rank zero, and the rendezvous."""
