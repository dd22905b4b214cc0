"""The runner on a Ray cluster, and everything else that imports `ray`."""
