"""`pycomm bench`: what collectives cost here, beside other libraries, every result verified.

    cases, buffers      what is called: sizes, nccl-tests' factors, the values that go in and must come out (numpy alone)
    libraries           the same case on pycomm, Gloo and NCCL; workloads: MoE exchange, overlap, pairs of ranks
    mpi, mpi_rank       an MPI's ranks, as a companion job on the same host
    roofline            what memory and links allow, measured in the same run
    measure             the libraries in turns, block by block
    report, compare     table, CSV, JSON, PNG; regressions against an earlier record
    job, command        the ranks' environment and signals; the command line
"""
