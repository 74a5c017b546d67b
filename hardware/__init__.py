"""Devices and runtimes: what turns a model into a file for a target, runs it there and measures it."""
