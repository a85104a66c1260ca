"""What `cadapter doctor` looks at: packages, GPUs, kernels, processes, disks and limits of this machine.

Nothing here needs a package to be there: what is missing or broken is a finding.
"""
