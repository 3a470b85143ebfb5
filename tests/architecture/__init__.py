"""Policy as tests: each rule is a function of a root folder, and is shown to fail on a planted violation."""
