from memcube.cli import main

main()
