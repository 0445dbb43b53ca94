"""The experiments, one file each; file names are experiments' names with underscores for hyphens."""
