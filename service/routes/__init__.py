"""The routes, one noun a file. Each receives its parts from the app and keeps no state of its own."""
