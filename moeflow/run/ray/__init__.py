"""The runner on a Ray cluster, and all else that imports `ray`."""
