"""Lets several processes work on one run: collectives, work for rank zero, and the rendezvous."""
