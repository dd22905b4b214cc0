"""What makes a pipeline run on a small model, in words."""

TEXT = ["calibration.sequences=8", "calibration.length=16", "calibration.batch=2"]
RECORDED = ["calibration.record=128", "calibration.per_expert=4"]
HELD_OUT = ["heldout.sequences=2", "heldout.length=16"]
GENETIC = ["search.population=10", "search.generations=3"]
ALONE = ["gang.processes=1", "gang.zero=0", "gang.offload=false"]
TUNED = ["tune.rows=8", "tune.batch=4", "tune.epochs=1", "tune.rate=1e-2", "tune.length=16", *ALONE]
SMALL = [*TEXT, *RECORDED, *HELD_OUT]
