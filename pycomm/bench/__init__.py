"""`pycomm bench`: what collectives cost here, beside other libraries, every result verified.

cases, buffers      what is called: sizes, nccl-tests' factors; what goes in and must come out (numpy alone)
trials, libraries   the same case on pycomm, Gloo and NCCL; workloads: MoE exchange, overlap, pairs of ranks
mpi, mpi_rank       an MPI's ranks, as a companion job on the same host; baselines: which libraries there are
roofline            what memory and links allow, measured in the same run
measure             the libraries in turns, block by block
report, record      table; JSON, CSV and what --compare finds; plot: PNG; progress: the bar
job                 the ranks' environment and signals; options, command: the command line
"""
