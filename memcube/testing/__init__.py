"""What tests share: contract suites and doubles. Needs pytest and hypothesis."""
