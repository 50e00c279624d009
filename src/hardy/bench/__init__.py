"""Measurements of Hardy's speed and memory on the user's own machine: ``hardy bench``.

Every section of `hardy.bench.options` is a module of the same name whose ``measure`` yields what it has found, part by part. A
section runs in a process of its own (`hardy.bench.worker`), so that what one leaves in caches and allocators reaches no other.
"""
