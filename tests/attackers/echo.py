"""The same as echo.c."""

import socket

connection = socket.socket(fileno=3)
while data := connection.recv(256):
    connection.sendall(data)
