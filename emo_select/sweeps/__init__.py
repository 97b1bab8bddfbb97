"""Many runs from a file: expanded, shared, handed to Slurm or done here, watched and resumed.

`spec` reads the file, `graph` finds units of work, `bench` says what is left of each, `estimate` what that costs.
`control` hands units to `slurm` or `local`, whose workers call `work`. `store` keeps units, attempts and arrays;
`states` says what became of each unit, `report` what it cost. None of these modules imports torch when imported.
"""
