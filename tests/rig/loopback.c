/* Preloaded into a server that would listen on every address: it listens on 127.0.0.1 instead. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

int bind(int fd, const struct sockaddr *address, socklen_t length) {
  static int (*real)(int, const struct sockaddr *, socklen_t);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "bind");
  if (address->sa_family == AF_INET) {
    struct sockaddr_in here;
    memcpy(&here, address, sizeof here);
    if (here.sin_addr.s_addr == htonl(INADDR_ANY)) here.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return real(fd, (struct sockaddr *)&here, sizeof here);
  }
  if (address->sa_family == AF_INET6) {
    struct sockaddr_in6 here;
    memcpy(&here, address, sizeof here);
    if (!memcmp(&here.sin6_addr, &in6addr_any, sizeof in6addr_any)) {
      /* 127.0.0.1 mapped: clients come over IPv4 */
      static const unsigned char mapped[16] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 127, 0, 0, 1};
      memcpy(&here.sin6_addr, mapped, sizeof mapped);
    }
    return real(fd, (struct sockaddr *)&here, sizeof here);
  }
  return real(fd, address, length);
}
