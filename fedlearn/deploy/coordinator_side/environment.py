"""Name the environment variables with which the coordinator configures its processes."""

NODES_ENV = "FEDLEARN_NODES"  # folder of the admitted nodes' keys
PERSONS_ENV = "FEDLEARN_PERSONS"  # path of the list of persons
LOCAL_DIGEST_ENV = "FEDLEARN_COORDINATOR_TOKEN_SHA256"  # digest of the token of the coordinator's own process
STATE_ENV = "FEDLEARN_COORDINATOR_STATE"  # state folder of the coordinator
RUNS_ENV = "FEDLEARN_RUNS"  # folder of the run folders
