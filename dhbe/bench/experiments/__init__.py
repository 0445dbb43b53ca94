"""The experiments, one short file each; a file's name is the experiment's, with a hyphen for the underscore."""
