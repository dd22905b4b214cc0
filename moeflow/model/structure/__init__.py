"""Find out what a model type is made of by looking at transformers' own model of it.

A tiny random model of that very type is built from the checkpoint's config.json with smaller sizes (`tiny`), its parts are found by
running it (`anatomy`), the names on disk by saving it (`names`), the router's arithmetic by comparing what we know with what it
computes (`routing`), and the whole is believed only if everything agrees (`proof`). Building a graph imports no torch, so this runs
as a process of its own: `moeflow.arch.found` starts it and remembers its answer.
"""
